"""A child that holds some memory for a while and then aborts without a word, as PDFium does when it gets no more.

One that holds nothing closes its output and stays, as one might that a document has taken over.
"""

import os
import time


def main(held_mib: str, raw_limits: str) -> None:
    if held_mib == "0":
        os.closerange(0, 3)
        time.sleep(3600)
    held = b"x" * (int(held_mib) << 20)
    time.sleep(1)
    os.write(1, b"" if held else b"nothing held")
    os.abort()
