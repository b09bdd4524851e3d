"""Train one stage with Megatron's own loop: `torchrun ... -m megatron_l0moe.training.pretrain [flags]`.

All flags are Megatron's, ours start with `--l0-`. Without CUDA the same command runs on the CPU with gloo.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import sentence_of
from megatron_l0moe.runtime import checkpoint_fixes, cpu, hardware


def main() -> None:
    """Parse, build, train."""
    cpu.install_training()
    checkpoint_fixes.install()
    # megatron is imported only now: the CPU runtime has to be in place before
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_l0moe.checkpoints.torch_dist import SETTINGS_KEY
    from megatron_l0moe.training import (
        arguments,
        checkpoints,
        early_end,
        forward_step,
        megatron_hooks,
        metrics,
        model,
    )
    from megatron_l0moe.training.forward_step import ForwardStep

    arguments.install_argv()
    arguments.check_command_line()
    args = parse_and_validate_args(extra_args_provider=arguments.add_l0_arguments)
    if not args.async_save:
        checkpoint_fixes.keep_results_here()
    settings = arguments.settings_from_args(args)
    config = model.model_config(args, settings)
    config.pre_wrap_hooks.append(functools.partial(checkpoints.check, args=args, settings=settings))
    megatron_hooks.add_to_checkpoints(lambda: {SETTINGS_KEY: arguments.settings_as_dict(settings)})
    megatron_hooks.add_to_optimizer(model.group_overrides(settings.stage))
    file = settings.stage.l0_metrics_file
    writer = metrics.MetricsWriter(Path(file) if file else None, settings)
    if file or args.tensorboard_dir or args.wandb_project:
        config.post_wrap_hooks.append(functools.partial(_remember_models, writer))
        megatron_hooks.before_log(writer.see)
    provider = functools.partial(forward_step.datasets_provider, args)
    provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks the function itself
    folder, seconds = Path(file).parent, settings.stage.l0_gpu_sample_seconds if file else 0.0
    with early_end.watched(args, settings.stage.l0_stop_file), hardware.sampled(folder, seconds):
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            provider,
            ModelType.encoder_or_decoder,
            ForwardStep(settings, on_start=writer.start_clock),
        )


def _remember_models(writer: Any, models: list[Any]) -> list[Any]:
    writer.models = models
    return models


def exit_with_one_sentence(command: Callable[[], None]) -> None:
    """Run a command; end with exit code 2 and one sentence where the user can mend it."""
    try:
        command()
    except Exception as error:
        sentence = sentence_of(error, Path())
        if sentence is None:
            raise
        sys.stderr.write(f"Error: {sentence}\n")
        sys.exit(2)


if __name__ == "__main__":
    exit_with_one_sentence(main)
