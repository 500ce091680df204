"""A child that holds some memory for a while and then aborts without a word, as PDFium does when it gets no more."""

import os
import time


def main(held_mib: str, raw_limits: str) -> None:
    held = b"x" * (int(held_mib) << 20)
    time.sleep(1)
    os.write(1, b"" if held else b"nothing held")
    os.abort()
