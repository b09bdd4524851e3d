"""Linear, LayerNormLinear and GroupedLinear.

Shapes: T = rows, i = in_features, o = out_features.
"""

import torch
from torch.nn import functional


class TransformerEngineBaseModule(torch.nn.Module):
    """State that Megatron's wrappers read."""

    def __init__(self, name=None) -> None:
        super().__init__()
        self.name = name
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def _new(self, name: str, shape: tuple[int, ...], dtype, device, init_method=None) -> None:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        if init_method is not None:
            init_method(parameter)
        self.register_parameter(name, parameter)


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ) -> None:
        super().__init__(name)
        assert tp_size == 1, "one rank only"
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.parallel_mode = bias, parallel_mode
        self._new("weight", (out_features, in_features), params_dtype, device, init_method)
        if bias:
            self._new("bias", (out_features,), params_dtype, device)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return functional.linear(inp, self.weight, self.bias if self.use_bias else None)


class LayerNormLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ) -> None:
        super().__init__(name)
        assert (tp_size, normalization, zero_centered_gamma) == (1, "RMSNorm", False)
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self.use_bias, self.parallel_mode = bias, parallel_mode
        self._new("layer_norm_weight", (in_features,), params_dtype, device, torch.nn.init.ones_)
        self._new("weight", (out_features, in_features), params_dtype, device, init_method)
        if bias:
            self._new("bias", (out_features,), params_dtype, device)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        normed = functional.rms_norm(inp, (self.in_features,), self.layer_norm_weight, self.eps)
        return functional.linear(normed, self.weight, self.bias if self.use_bias else None)


class GroupedLinear(TransformerEngineBaseModule):
    """One linear layer for each expert, applied to consecutive rows: [T, i] -> [T, o]."""

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
        single_grouped_weight=False,
        single_grouped_bias=False,
        name=None,
    ) -> None:
        super().__init__(name)
        assert (tp_size, single_grouped_weight, single_grouped_bias, bias) == (1, False, False, False)
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features, self.out_features, self.parallel_mode = in_features, out_features, parallel_mode
        for i in range(num_gemms):
            self._new(f"weight{i}", (out_features, in_features), params_dtype, device, init_method)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        rows = torch.split(inp, [int(split) for split in m_splits])
        weights = (getattr(self, f"weight{i}") for i in range(self.num_gemms))
        return torch.cat([functional.linear(part, w) for part, w in zip(rows, weights, strict=True)])
