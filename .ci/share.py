"""A plugin of pytest for the middle Pythons, which differ least: of each table of tests the
first row, and of all other rows a fifth, another one for each of them."""
import sys

MIDDLE = [7, 8, 9, 10, 12]


def pytest_collection_modifyitems(items):
    kept, seen = [], set()
    for number, item in enumerate(items):
        is_first = item.function not in seen
        seen.add(item.function)
        if is_first or number % len(MIDDLE) == MIDDLE.index(sys.version_info[1]):
            kept.append(item)
    items[:] = kept
