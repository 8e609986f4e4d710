from executor.running.starting import StartTimes


def test_a_start_is_told_part_by_part() -> None:
    times = StartTimes()
    for part in ("processes", "loading", "compiling"):
        times.passed(part)
    times._last = times._begun + 9.26
    times.parts = {"processes": 2.06, "loading": 6.0, "compiling": 0.01, "engines": 1.2}
    assert times.line() == "start: 9.3 s, of which loading 6.0, processes 2.1, engines 1.2"
