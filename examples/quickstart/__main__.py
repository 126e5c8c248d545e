import sys

from examples.quickstart.run import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing is left running. The same command starts again from the beginning.")
