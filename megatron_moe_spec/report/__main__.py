"""``python -m megatron_moe_spec.report``."""

from megatron_moe_spec.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
