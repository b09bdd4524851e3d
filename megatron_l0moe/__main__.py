"""`python -m megatron_l0moe` is the `l0moe` command."""

from megatron_l0moe.cli import main

if __name__ == "__main__":
    main()
