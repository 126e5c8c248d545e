import sys

from examples.compare.command import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing is left running. The same command goes on after the last finished run.")
