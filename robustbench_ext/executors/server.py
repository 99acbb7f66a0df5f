"""The first import of the fork server: it puts the current folder behind the installed packages.

The server is started as `python -c`, which looks into the current folder first, and before Python 3.13 nobody tells it the
path of the run. A user's own package `uq` or `reports` there would be taken for ours, in the server and in all its workers.
"""

import sys

if "" in sys.path:
    sys.path.remove("")
    sys.path.append("")
