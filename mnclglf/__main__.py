"""python -m mnclglf"""

from mnclglf.cli import main

raise SystemExit(main())
