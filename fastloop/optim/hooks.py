# SPDX-License-Identifier: Apache-2.0
"""The wrapper of every optimizer's `step`: torch's hooks and profiler, and torch.compile, at no cost without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer


def hooked_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own hooks and profiler record around `step`, entered only when one of them is there.

    torch patches the step of every optimizer class with a wrapper that costs 7 us without any hook. A step that is
    marked as hooked is left alone, so the hooks fire once, here.
    """
    with_hooks = Optimizer.profile_hook_step(step)
    profiler = torch.autograd.profiler
    global_pre, global_post = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).step is wrapper and (  # else a subclass's own step, which torch has hooked, is calling this one
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or global_pre
            or global_post
            or profiler._is_profiler_enabled
        ):
            return with_hooks(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]
    _keep_dynamo_out(wrapper)
    return wrapper


def _keep_dynamo_out(step: Any) -> None:
    """torch.compile breaks its graph at `step` and looks at nothing below it; at no cost to a step outside of it.

    A decorator from torch.compiler would do the same for half a microsecond a call.
    """
    step._torchdynamo_disable = True
    step._torchdynamo_disable_msg = "an optimizer of fastloop steps in one native call"
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return  # it then tries, and breaks the graph all the same
    set_code_exec_strategy(step.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
