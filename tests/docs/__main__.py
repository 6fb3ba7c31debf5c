"""`python -m tests.docs`, or `make docs`: write the pages that are made from the code."""

from tests.docs.patterns_page import PAGE, page


def main() -> None:
    """Write docs/patterns.md."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
