"""The page of results."""


def write_page(a, b):
    return b
