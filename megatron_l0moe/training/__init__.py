"""The training jobs, on Megatron's own loop; the only importer of megatron.training."""
