"""If these fail, users cannot catch meshbolt's errors by the builtin types they know, or get no hint at a wrong name."""

import pytest

from meshbolt import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.TopologyError, ValueError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.CheckpointError, RuntimeError),
        (errors.RankError, RuntimeError),
        (errors.StorageError, OSError),
        (errors.MissingPackageError, ImportError),
    ],
)
def test_every_error_is_a_meshbolt_error_and_a_builtin_one(error, builtin):
    assert issubclass(error, errors.MeshboltError)
    assert issubclass(error, builtin)


def test_a_wrong_name_gets_the_closest_known_one_and_the_list():
    assert errors.did_you_mean("zero4", ["zero3", "zero2"]) == " (did you mean 'zero3'? known: zero2, zero3)"


def test_a_name_unlike_all_others_gets_the_list_only():
    assert errors.did_you_mean("xyz", ["zero2"]) == " (known: zero2)"
