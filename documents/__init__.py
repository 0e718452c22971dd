"""Documents that the repository draws itself, with questions and exact answers; training and evaluation share them."""

import tools  # noqa: F401  (a command ends as `tools.command_line` says)
