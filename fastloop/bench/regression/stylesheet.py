# SPDX-License-Identifier: Apache-2.0
"""How report.html looks: light and dark, wide, narrow and printed."""

LIGHT = (
    "--back:#fff;--panel:#f5f7f9;--text:#1b2026;--muted:#545d68;--rule:#d3d9e0;--link:#0b57d0;--head:#0b57d0;"
    "--base:#7a828c;--bad:#b3261e;--good:#156c38;--doubt:#7a5200;--grid:#dfe4e9"
)
DARK = (
    "--back:#12161b;--panel:#1b2128;--text:#e7eaee;--muted:#a8b1bc;--rule:#38414c;--link:#8ab4f8;--head:#8ab4f8;"
    "--base:#9aa4af;--bad:#ff8f85;--good:#74d895;--doubt:#e6bd67;--grid:#2b333c"
)

CSS = (
    f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
@media print{{:root{{color-scheme:light;{LIGHT}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 20px 64px}
h1,h2,h3{line-height:1.25;margin:0;text-wrap:balance}
h1{font-size:1.6rem}
h2{font-size:1.2rem;margin:44px 0 4px}
h3{font-size:1rem;margin:22px 0 4px}
p{margin:6px 0 12px;max-width:78ch}
a{color:var(--link)}
code,.case{font-family:ui-monospace,"SF Mono","Cascadia Mono","DejaVu Sans Mono",monospace;font-size:.92em}
code,.case,.note,dd,li{overflow-wrap:anywhere}
.what{min-width:8rem;overflow-wrap:anywhere}
.number span{display:block}
.number span+span{font-size:.85em;color:var(--muted)}
.muted,.note,caption,figcaption,dt{color:var(--muted)}
.note{font-size:.9em;display:block;font-family:system-ui,sans-serif}

.verdict{border:1px solid var(--rule);border-left:6px solid var(--tone);background:var(--panel);padding:16px 20px;
  border-radius:6px}
.verdict p{font-size:1.05rem;margin:6px 0 0;max-width:none;overflow-wrap:anywhere}
.verdict .word{color:var(--tone)}
.wrong,.bad{--tone:var(--bad)}
.ok{--tone:var(--good)}
.void,.none{--tone:var(--muted)}
.facts{display:flex;flex-wrap:wrap;gap:6px 28px;margin:16px 0 0}
.facts div{min-width:0}
.facts dt{font-size:.85rem}
.facts dd{margin:0}
nav{margin-top:14px;display:flex;flex-wrap:wrap;gap:4px 18px}

.box{overflow-x:auto;border:1px solid var(--rule);border-radius:6px;margin:10px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:8px 12px;font-size:.9em}
th,td{text-align:left;padding:7px 12px;border-top:1px solid var(--rule);vertical-align:middle}
thead th{font-size:.85rem;color:var(--muted);font-weight:600;border-top:0;vertical-align:bottom;white-space:nowrap}
caption+thead th{border-top:1px solid var(--rule)}
tbody th{font-weight:500;min-width:11rem}
.number{text-align:right;white-space:nowrap}
thead .number{text-align:right}
.state{white-space:nowrap;font-weight:600;font-size:.88rem}
.tag{display:inline-block;border:1px solid var(--rule);border-radius:4px;padding:0 6px;font-size:.8rem;
  color:var(--muted);margin-left:6px;font-family:system-ui,sans-serif}
.plot{position:relative;width:36%;min-width:260px;padding:0}
thead .plot{padding:0 0 4px}
.bad-row .state{color:var(--bad)}
.good-row .state{color:var(--good)}
.doubt-row .state{color:var(--doubt)}

svg{overflow:visible;display:block}
svg text{fill:var(--text);font:11px system-ui,sans-serif;stroke:none}
svg line{stroke-width:1}
.plot{--ink:var(--base)}
.bad-row .plot{--ink:var(--bad)}
.good-row .plot{--ink:var(--good)}
.plot .row{position:absolute;inset:0 14px;width:calc(100% - 28px);height:100%}
.plot .axis{width:calc(100% - 28px);margin:0 14px}
.row .tick{display:none}
.bar{stroke:var(--ink);stroke-width:4!important;stroke-opacity:.55}
.cap,.again.cap{stroke:var(--ink);stroke-width:2}
.median,.point{fill:var(--ink);stroke:var(--back);stroke-width:1}
.again.bar{stroke-width:2!important}
.again.median{fill:var(--back);stroke:var(--ink);stroke-width:2}
.beyond,.name{font-weight:600!important}
.one{stroke:var(--muted)}
.limit{stroke:var(--muted);stroke-dasharray:5 3}
.sure{stroke:var(--muted);stroke-dasharray:1 3}
.grid{stroke:var(--grid)}
.floor{stroke:var(--text);stroke-width:2.5!important}
.bar.failed,.bar.held{stroke-width:9!important}
.between{stroke:var(--rule)}
.between.again{stroke:var(--muted)}
.band{fill:var(--head);fill-opacity:.13}
.dots{fill:none;stroke-linecap:round;stroke-width:6.5px;vector-effect:non-scaling-stroke}
.dots.head{stroke:var(--head)}
.dots.base{stroke:var(--base)}
.dots.hole{stroke:var(--back);stroke-width:3px}
.point.head{fill:var(--head)}
.middle{stroke:var(--text);stroke-width:2.5!important}

details{border:1px solid var(--rule);border-radius:6px;margin:8px 0}
summary{cursor:pointer;padding:8px 12px;overflow-wrap:anywhere}
summary .number{margin-left:10px}
details[open]>summary{border-bottom:1px solid var(--rule)}
details .box{border:0;margin:0}
details>p,details>ul{margin-left:12px;margin-right:12px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:20px 28px;padding:12px}
figure{margin:0;min-width:0}
figcaption{font-size:.9em;margin-bottom:8px}
.strip{width:calc(100% - 72px);margin:0 8px 0 64px}
.key{display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:8px 0;list-style:none;font-size:.9em;color:var(--muted)}
.key li{display:flex;gap:7px;align-items:center}
.key svg{width:26px;height:14px;flex:none;--ink:var(--base)}
.list{columns:2 26rem;column-gap:28px;margin:12px 0;padding:0}
.list div{break-inside:avoid;display:grid;grid-template-columns:9.5rem 1fr;gap:0 12px;padding:3px 0}
.list dd{margin:0}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}

@media (max-width:1080px){
th,td{padding:7px 8px}
tbody th{min-width:8rem}
.plot{width:26%;min-width:225px}
}
@media (max-width:990px){
main{padding:14px 12px 48px}
h1{font-size:1.35rem}
.verdict{padding:12px 14px}
.cards,.cards tbody,.cards caption{display:block}
.cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.cards tr{display:block;padding:10px 12px;border-top:1px solid var(--rule)}
.cards tr:first-child{border-top:0}
.cards th,.cards td{display:flex;justify-content:space-between;gap:12px;text-align:right;padding:1px 0;border:0;
  white-space:normal;min-width:0}
.cards tbody th{text-align:left;display:block;padding-bottom:4px}
.cards td::before{content:attr(data-label);color:var(--muted);font-weight:400;text-align:left;flex:none}
.cards td:empty{display:none}
.cards .plot{display:block;width:100%;height:62px;min-width:0;margin:4px 0}
.cards .plot.share{height:26px}
.cards .plot::before{display:none}
.cards .plot .row{inset:0 12px 16px;width:calc(100% - 24px);height:calc(100% - 16px)}
.cards .plot.share .row{inset:0 2px;height:100%}
.row .tick{display:inline;transform:translateY(13px);fill:var(--muted)}
.list div{grid-template-columns:1fr;padding:5px 0}
.strip{width:calc(100% - 64px);margin:0 6px 0 56px}
}
@media print{
body{font-size:11px}
main{max-width:none;padding:0}
nav{display:none}
details::details-content{content-visibility:visible;height:auto}
tr,figure,.verdict{break-inside:avoid}
*{print-color-adjust:exact}
}
"""
)
