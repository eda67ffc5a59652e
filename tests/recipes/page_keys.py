# SPDX-License-Identifier: Apache-2.0
"""What the four source documents hold, in their order: docs/recipes.md has a row for each.

The documents are not in the repository. A line "## ..." is a document, "### ..." one of its chapters, "= ..." is one of
its headings, "☐ ..." a line of a checklist, any other one a strategy, a pitfall, a table or a line of a list.
"""

KEYS = """
## deep-learning-best-practices.md
### The page
= Deep Learning Best Practices
### Model Design Best Practices
= Model Design Best Practices
= Architecture Selection
Architecture: fits the problem
Architecture: simple first
Architecture: computing limits
= Layer Design
Layers: how many
Layers: how large
Layers: residual connections
= Activation Functions
Activation: ReLU by default
Activation: leaky against dying neurons
Activation: sigmoid for two classes
Activation: softmax for many classes
### Training Best Practices
= Training Best Practices
= Data Preparation
Data: mean 0, variance 1
Data: augmentation
Data: three splits
Data: imbalance
= Hyperparameter Selection
Hyperparameters: schedule
Hyperparameters: early stopping
Hyperparameters: batch size
Hyperparameters: weight decay
= Monitoring
Monitoring: train and validation
Monitoring: gradient norms
Monitoring: TensorBoard, W&B
Monitoring: checkpoints
### Deployment Best Practices
= Deployment Best Practices
= Model Optimization
Optimization: quantization
Optimization: pruning
Optimization: ONNX, TorchScript
= Serving
Serving: batches
Serving: accelerators
Serving: monitor production
Serving: A/B test
### Common Pitfalls to Avoid
= Common Pitfalls to Avoid
Pitfall: overfitting small data
Pitfall: leakage
Pitfall: learning rate
Pitfall: imbalance
Pitfall: initialization
Pitfall: gradients
Pitfall: regularization
### Debugging Strategies
= Debugging Strategies
Debugging: overfit a subset
Debugging: complexity step by step
Debugging: synthetic data
Debugging: gradient checking
Debugging: activations and gradients
## deep-learning-best-practices-and-tips.md
### The page
= Deep Learning Best Practices and Tips
= Table of Contents
### 1. Getting Started Right
= 1. Getting Started Right
= 1.1 Start Simple, Add Complexity Gradually
= 1.2 Overfit a Single Batch First
1.2 if it fails
= 1.3 Establish Strong Baselines
### 2. Data Preparation
= 2. Data Preparation
= 2.1 Understand Your Data First
= 2.2 Proper Data Normalization
2.2 only the train split
= 2.3 Data Augmentation Best Practices
2.3 look at it first
2.3 keep the meaning
2.3 longer training
2.3 not in validation
= 2.4 Handle Class Imbalance
2.4 weighted loss
2.4 oversampling
2.4 focal loss
### 3. Model Architecture
= 3. Model Architecture
= 3.1 Weight Initialization Matters
3.1 initial gradients
= 3.2 Batch Normalization Best Practices
3.2 enough samples
3.2 norm by batch size
= 3.3 Dropout Usage
3.3 tune the rate
3.3 off in evaluation
### 4. Training Loop
= 4. Training Loop
= 4.1 Learning Rate is Most Important
4.1 range test
4.1 schedulers
= 4.2 Proper Training Loop
### 5. Debugging and Troubleshooting
= 5. Debugging and Troubleshooting
= 5.1 Loss Not Decreasing
5.1 problem 1: oscillates
5.1 problem 2: stuck at chance
5.1 problem 3: NaN
5.1 problem 4: falls, then rises
5.1 problem 5: validation rises
= 5.2 Model Performance Plateaus
### 6. Performance Optimization
= 6. Performance Optimization
= 6.1 Speed Up Training
6.1 cuDNN benchmark
6.1 pinned memory
6.1 number of workers
6.1 mixed precision
6.1 gradient accumulation
= 6.2 Reduce Memory Usage
6.2 gradient checkpointing
6.2 smaller batch, same effective one
6.2 for inference
6.2 memory in use
### 7. Experiment Tracking
= 7. Experiment Tracking
= 7.1 Organize Experiments
= 7.2 Use Weights & Biases
### 8. Production Deployment
= 8. Production Deployment
= 8.1 Model Export
8.1 TorchScript
8.1 ONNX
8.1 quantization
### 9. Hardware Considerations
= 9. Hardware Considerations
= 9.1 GPU Utilization
### 10. Common Pitfalls and Solutions
= 10. Common Pitfalls and Solutions
= 10.1 Quick Reference
Pitfall 1: no eval mode
Pitfall 2: softmax before cross-entropy
Pitfall 3: gradients not cleared
Pitfall 4: statistics before the split
Pitfall 5: rate too high
Pitfall 6: no augmentation
Pitfall 7: small batches under BatchNorm
Pitfall 8: not shuffled
Pitfall 9: no schedule
Pitfall 10: no validation
### Summary Checklist
= Summary Checklist
☐ Before: analyze the dataset
☐ Before: visualize samples
☐ Before: baselines
☐ Before: overfit one batch
☐ Before: learning rate
☐ Before: normalization
☐ Before: augmentation
☐ During: mixed precision
☐ During: both metrics
☐ During: schedule
☐ During: clipping
☐ During: checkpoints
☐ During: track experiments
☐ After: test set once
☐ After: errors
☐ After: bias and fairness
☐ After: export
☐ After: document
☐ Production: optimize
☐ Production: monitoring
☐ Production: A/B test
☐ Production: plan updates
☐ Production: document deployment
### References
= References
## training-checklist-and-templates.md
### The page
= Comprehensive Deep Learning Training Checklist & Templates
### 1. Training Loop Template & Checklist
= 1. Training Loop Template & Checklist
= Pre-Training Setup Checklist
☐ Data pipeline
☐ Data: batch size, shuffled training
☐ Data: workers
☐ Data: pinned memory
☐ Data: validation not shuffled
☐ Data: augmentation in training only
☐ Model initialization
☐ Model: device
☐ Model: weights
☐ Model: summary logged
☐ Loss function
☐ Loss: fits the task
☐ Loss: label smoothing
☐ Loss: class weights
= Optimizer Configuration Checklist
= Core Optimizer Options
☐ Optimizer and parameters
☐ Parameter groups
= Learning Rate Scheduling Options
☐ Scheduler
= Gradient Management Options
☐ Gradient clipping
☐ Gradient accumulation
= Complete Training Loop Template
= Training Loop Mental Checklist (Every Epoch)
☐ 1 train mode
☐ 2 clear gradients
☐ 3 forward
☐ 4 loss
☐ 5 scale for accumulation
☐ 6 backward
☐ 7 clipping
☐ 8 step
☐ 9 clear again
☐ 10 eval mode
☐ 11 no gradients
☐ 12 schedule
☐ 13 log and save
### 2. Checkpointing & State Management
= 2. Checkpointing & State Management
= What to Save in Checkpoints
= Loading and Resuming Training
= Checkpoint Management Best Practices
= Checkpoint Strategy Checklist
☐ Regular
☐ Regular: every N epochs
☐ Regular: each epoch's end
☐ Regular: the last K
☐ Best
☐ Best: validation loss
☐ Best: validation accuracy
☐ Best: a file for each metric
☐ Emergency
☐ Emergency: shutdown
☐ Emergency: interruption
☐ Emergency: out of memory
= File Organization
= Checkpoint Validation
= Memory-Efficient Checkpointing
### Final Pre-Training Checklist
= Final Pre-Training Checklist
= Before Starting Training
☐ Before: data pipeline
☐ Before: architecture
☐ Before: loss function
☐ Before: optimizer and scheduler
☐ Before: clipping
☐ Before: checkpoint folder
☐ Before: GPU memory
☐ Before: baselines
☐ Before: logging
☐ Before: early stopping
= During Training Monitor
☐ During: losses
☐ During: learning rate
☐ During: gradient norms
☐ During: GPU memory
☐ During: speed
☐ During: sizes of checkpoints
☐ During: convergence
= Post-Training Validation
☐ After: final evaluation
☐ After: best checkpoint
☐ After: curves
☐ After: artifacts
☐ After: results
☐ After: ready for inference
## training-strategies.md
### The page
= Training Strategies for Deep Learning
= Table of Contents
### Introduction
= Introduction
### Learning Rate Schedules (Advanced)
= Learning Rate Schedules (Advanced)
= Learning Rate Warm-Up (Deep Dive)
= Cyclical Learning Rates
= One-Cycle Policy (Deep Dive)
= ReduceLROnPlateau
### Mixed Precision Training
= Mixed Precision Training
= Motivation
= Floating Point Formats
Formats: comparison table
= Challenges with FP16
Challenge 1: underflow
Challenge 2: overflow
Challenge 3: small updates
= Mixed Precision Training Algorithm
= PyTorch Automatic Mixed Precision (AMP)
= BF16 Training
= Memory Savings Example
### Gradient Accumulation
= Gradient Accumulation
= Motivation
= Algorithm
= PyTorch Implementation
= With Mixed Precision
= Batch Size vs Gradient Accumulation
### Curriculum Learning
= Curriculum Learning
= Core Idea
= Example Curricula
= Implementation Strategies
Curriculum strategy 1: hard example mining
Curriculum strategy 2: loss-based
Curriculum strategy 3: sequence length
= When to Use Curriculum Learning
### Transfer Learning and Fine-Tuning
= Transfer Learning and Fine-Tuning
= Transfer Learning Paradigm
= Fine-Tuning Strategies
Fine-tuning strategy 1: feature extraction
Fine-tuning strategy 2: all layers
Fine-tuning strategy 3: discriminative rates
Fine-tuning strategy 4: gradual unfreezing
= Learning Rate Guidelines for Fine-Tuning
= Modern Transfer Learning (2025)
### Model Checkpointing
= Model Checkpointing
= Why Checkpointing?
= What to Save
= Loading Checkpoints
= Checkpointing Strategies
Checkpoint strategy 1: periodic
Checkpoint strategy 2: best
Checkpoint strategy 3: the best K
Checkpoint strategy 4: exponentially spaced
### Distributed Training
= Distributed Training
= Why Distributed Training?
= Data Parallel (DP) - Simple but Limited
= Distributed Data Parallel (DDP) - Recommended
= Fully Sharded Data Parallel (FSDP) - For Very Large Models
### Hyperparameter Tuning
= Hyperparameter Tuning
= Key Hyperparameters (Priority Order)
= Search Strategies
Search strategy 1: manual
Search strategy 2: grid
Search strategy 3: random
Search strategy 4: Bayesian
= Hyperparameter Ranges (2025 Defaults)
### Complete Production Training Pipeline
= Complete Production Training Pipeline
### 2025 Best Practices
= 2025 Best Practices
= Essential Checklist
☐ Before: seeds
☐ Before: mixed precision
☐ Before: clipping
☐ Before: logging, tracking
☐ Before: data loading
☐ During: losses
☐ During: NaN and Inf
☐ During: gradient norms
☐ During: GPU use
☐ During: checkpoints
☐ After: test set
☐ After: baselines
☐ After: failures
☐ After: best model and config
= Typical Training Time Estimates (2025)
= Common Training Issues and Solutions
Issue: exploding gradients
Issue: vanishing gradients
Issue: slow convergence
Issue: overfitting
Issue: underfitting
Issue: out of memory
### Summary
= Summary
### References
= References
"""

# Of each document: headings, lines of checklists. Counted in the documents themselves.
COUNTS = {
    "deep-learning-best-practices.md": (14, 0),
    "deep-learning-best-practices-and-tips.md": (35, 23),
    "training-checklist-and-templates.md": (21, 67),
    "training-strategies.md": (53, 14),
}
