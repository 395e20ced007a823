"""The world draws what the packaged models were trained on."""

import pytest

from tests.microworld.digests import digest_of
from vlmteacher.microworld import world

# They change only with a retraining of the packaged models.
DIGESTS = {
    "move": "f8ac41136b970411772ed08956c6f5ba",
    "maze": "5c28482f32ac3b2c4af6be065fcb5b04",
    "deliver": "31519b13584a490690f2ad4ff194e20f",
    "recolor": "fde9da3de989cec55f02e1f84e7345e7",
    "resize": "ec625bbe12cc276187fee87548a2bbbe",
    "rotate": "1874b566db1933126b0ee208f3f3f401",
    "sort": "dddedaff20b98f7afae17bfdbfb484bf",
    "connect": "a736b0bb4c8c2d880db3bff47534e6e1",
    "odd": "18c5c04c855d75e0450e3ca70300cdf1",
    "count": "2d47231058e96ad2cec25d42f0cd2700",
}


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_family_is_drawn_asked_about_and_corrupted_as_before(family):
    assert digest_of(family, scenes=2, exact=False) == DIGESTS[family]
