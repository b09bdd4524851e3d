"""Flags of Megatron that a recipe's `flags:` may not set, or that a trial leaves out."""

OWNED_BY_THE_CHAIN = frozenset(
    {
        *("load", "save", "pretrained-checkpoint", "train-iters", "seq-length", "global-batch-size", "seed"),
        *("l0-stage", "l0-dense-layers", "l0-expert-ffn", "l0-data-index", "l0-metrics-file", "l0-stop-file"),
        "l0-train-weights",  # expert_training.train_weights
        *("l0-blocks", "l0-block-threshold", "l0-block-sparsity-coeff"),  # the section dsmoe
        *("l0-masks", "l0-masks-top-k", "l0-masks-target", "l0-masks-balance-coeff"),  # the section mom
        *("num-experts", "moe-layer-freq", "moe-ffn-hidden-size", "moe-router-topk"),
        *("tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size"),
        *("expert-tensor-parallel-size", "context-parallel-size", "sequence-parallel"),
        *("num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage"),
        *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
        *("pipeline-model-parallel-layout", "no-overlap-p2p-communication"),
        *("tokenizer-type", "vocab-size", "ckpt-format", "micro-batch-size", "train-samples", "finetune"),
        # the exported layouts know softmax after top-k only
        *("moe-router-pre-softmax", "moe-router-score-function", "moe-router-topk-scaling-factor"),
        # end a job before its last step, with exit code 0
        *("exit-interval", "exit-duration-in-mins", "exit-signal-handler"),
    }
)
"""Flags that follow from the rest of the recipe or from the run folder, so `flags:` may not set them."""
NOT_IN_A_TRIAL = frozenset(
    {
        *("bf16", "fp16", "fp8-format", "fp8-recipe"),  # their rounding would hide what a trial looks for
        *("lr-warmup-iters", "lr-decay-iters", "lr-wsd-decay-iters"),  # count the steps of the whole stage
        *("use-distributed-optimizer", "dist-ckpt-optim-fully-reshardable", "overlap-param-gather"),
        "moe-token-dispatcher-type",
        *("tensorboard-dir", "wandb-project", "wandb-exp-name"),
    }
)
"""Flags of a recipe that a trial leaves out: precision, the stage's length, what a layout decides, what is written."""
