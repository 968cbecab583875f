"""Work in the background, and Ctrl-C in the foreground."""

from threading import Event

import pytest

from raytorch.system.background import BackgroundWork


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def test_the_first_ctrl_c_asks_the_work_to_stop_and_its_end_is_waited_for() -> None:
    asked = Event()
    work = BackgroundWork(lambda: asked.wait(60))
    work.follow(lambda: None if asked.is_set() else press_ctrl_c(), asked.set)
    assert (asked.is_set(), work.done.is_set(), work.error) == (True, True, None)


@pytest.mark.parametrize("again", ["look", "stop"])
def test_the_second_ctrl_c_is_raised_though_the_work_goes_on(again: str) -> None:
    ended, asked = Event(), Event()
    work = BackgroundWork(lambda: ended.wait(60))

    def stop() -> None:
        asked.set()
        if again == "stop":
            press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        work.follow(press_ctrl_c, stop)
    assert asked.is_set()
    assert not work.done.is_set()
    ended.set()
    assert work.done.wait(60)


def test_why_the_work_ended_is_kept_and_not_raised() -> None:
    work = BackgroundWork(lambda: [][0])
    work.follow(lambda: None, press_ctrl_c)
    assert isinstance(work.error, IndexError)


def test_what_goes_wrong_in_looking_is_raised() -> None:
    ended = Event()
    work = BackgroundWork(lambda: ended.wait(60))
    with pytest.raises(ZeroDivisionError):
        work.follow(lambda: 1 // 0, ended.set)
    ended.set()
