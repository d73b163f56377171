"""The TypedDict of verl's entropy controller equals the dataclass that it describes."""

from dataclasses import fields
from typing import get_type_hints

import pytest

from or1.magic.entropy import EntropyController

pytestmark = pytest.mark.integrations


def test_controller_settings_are_the_fields_of_the_controller():
    pytest.importorskip("verl")
    from or1.integrations.verl import ControllerDict

    assert get_type_hints(ControllerDict) == get_type_hints(EntropyController)
    assert ControllerDict.__optional_keys__ == {field.name for field in fields(EntropyController)}
