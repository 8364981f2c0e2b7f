"""A plugin of pytest for the Pythons beside the one that runs every test, 3.11: of each
table of tests the first row, by one of those that differ from it least, and of all other
rows a 24th by each; 2.7 and 3.6 run all first rows, and a third each of the others."""
import sys

MIDDLE = [7, 8, 9, 10, 12, 13]

def is_shared(number, is_first):
    """Whether this Python runs a test. number: of it, among all"""
    version = sys.version_info[1]
    if sys.version_info[0] == 2:
        return is_first or number % 3 == 1
    if version not in MIDDLE:
        return is_first or number % 3 == 0
    own = MIDDLE.index(version)
    return number % 24 == own or is_first and number % 6 == own

def pytest_collection_modifyitems(items):
    kept, seen = [], set()
    for number, item in enumerate(items):
        if is_shared(number, item.function not in seen):
            kept.append(item)
        seen.add(item.function)
    items[:] = kept
