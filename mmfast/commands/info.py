"""mmfast info"""

from .. import info
from . import common


def main(argv: list[str]) -> int:
    """Run the command."""
    common.Parser("info").parse_args(argv)
    common.say(info.report())
    return 0
