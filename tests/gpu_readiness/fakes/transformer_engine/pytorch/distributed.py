"""Names that Megatron imports for recomputation and random states."""


class CudaRNGStatesTracker:
    """Base of Megatron's TECudaRNGStatesTracker, which is used only with --te-rng-tracker."""


def activation_recompute_forward(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("FP8 recomputation")
