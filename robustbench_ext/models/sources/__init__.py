"""Where models come from: one file for each `SOURCE:NAME`, each with one function `load` from a `Wanted` to a `Found`.

The sources are listed in `robustbench_ext.catalog.SOURCES`. A package of your own adds one through an entry point in the group
`robustbench_ext.sources`.
"""

from robustbench_ext.models.sources.base import Found, Wanted

__all__ = ["Found", "Wanted"]
