"""Print the Megatron flags of a config in the form of Megatron's functional tests, one argument a line.

python examples/model_args.py configs/tiny.yaml
"""

import sys

import yaml


def model_args(path: str) -> list[str]:
    """``MODEL_ARGS:`` of a YAML file as arguments: true is the bare flag, false nothing, a list several values.

    Raises:
        ValueError: the file has no MODEL_ARGS, a key is no flag, or a flag has no value.
    """
    with open(path) as file:
        settings = (yaml.safe_load(file) or {}).get("MODEL_ARGS")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: MODEL_ARGS is missing, or no mapping")
    arguments = []
    for flag, value in settings.items():
        if not str(flag).startswith("--"):
            raise ValueError(f"{path}: {flag} is no flag (--{flag}?)")
        if value is None or value == "":
            raise ValueError(f"{path}: {flag} has no value (true for a flag without one)")
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            arguments += [flag, *map(str, values)]
    return arguments


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: model_args.py CONFIG.yaml")
    try:
        print("\n".join(model_args(sys.argv[1])))
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"model_args.py: {error}")
