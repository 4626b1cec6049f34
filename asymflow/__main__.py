import sys

from asymflow.cli import main

sys.exit(main())
