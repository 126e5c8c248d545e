import sys

from megatron_moe_spec.placement.command import main

sys.exit(main())
