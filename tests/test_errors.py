from __future__ import annotations

from rlhf.errors import UserError, find_user_error


def test_a_user_error_is_found_in_what_a_library_made_of_it() -> None:
    cause = UserError("the path is wrong")
    noise = ValueError("Does not validate")
    noise.__cause__ = cause
    assert find_user_error(noise) is cause
    assert find_user_error(KeyError("x")) is None
