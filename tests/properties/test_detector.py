"""Looking only at whom it is time to look at, against looking at everybody."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.detector import Activity, Detector, Verdict, Vital

ACTIVITIES: tuple[Activity, ...] = ("starting", "computing", "waiting", "paused", "ended")


class Obvious(Detector):
    def verdicts(self, now: float) -> tuple[Verdict, ...]:
        self._excuse(now)
        limit_s = self._silence_limit_s(now)
        found = [
            Verdict(what="node", node=node, why="its keeper has fallen silent", silent_s=now - heard)
            for node, heard in sorted(self.nodes.items())
            if now - heard > limit_s
        ]
        for verdict in found:
            self.forget_node(verdict.node)
        for member, rank in sorted(self.ranks.items()):
            if (judged := self._verdict(member, rank, now)) is not None:
                self.forget_rank(member)
                found.append(judged)
        return tuple(found)


@st.composite
def vitals(draw: st.DrawFn, node: int) -> tuple[Vital, ...]:
    members = draw(st.sets(st.sampled_from([node * 2, node * 2 + 1])))
    return tuple(
        Vital(
            member=member,
            alive=draw(st.integers(0, 15)) > 0,
            stopped=draw(st.integers(0, 3)) == 0,
            activity=draw(st.sampled_from(ACTIVITIES)),
            work=draw(st.integers(0, 3)),
            longest_s=draw(st.sampled_from([0.1, 0.5])),
        )
        for member in sorted(members)
    )


def take(
    detector: Detector, action: str, node: str, shown: tuple[Vital, ...], now: float
) -> tuple[Verdict, ...] | Verdict | None:
    match action:
        case "beat":
            return detector.beat(node, shown, now)
        case "look":
            return detector.verdicts(now)
        case "expect":
            return detector.expect(node, now)
        case "excuse":
            return detector.excuse(node, now + 5.0)
        case "end":
            return detector.node_ended(node, now)
        case _:
            return detector.forget_rank(int(node[-1]))


@settings(deadline=None)  # a busy machine is no finding
@given(st.data())
def test_nobody_is_found_dead_earlier_later_or_by_one_of_them_only(data: st.DataObject) -> None:
    both = [kind(detection_s=2.0, hung_at_least_s=3.0) for kind in (Detector, Obvious)]
    now = 0.0
    for _ in range(data.draw(st.integers(0, 60))):
        # Multiples of 1/8 are exact: a limit is met to the instant.
        now += data.draw(st.sampled_from([0.0, 0.125, 0.25, 0.25, 0.5, 1.0]))
        node = data.draw(st.integers(0, 3))
        action = data.draw(
            st.sampled_from(["beat", "beat", "beat", "look", "look", "expect", "excuse", "end", "forget"])
        )
        shown = data.draw(vitals(node)) if action == "beat" else ()
        told = [take(each, action, f"node{node}", shown, now) for each in both]
        assert told[0] == told[1]
        assert both[0].nodes == both[1].nodes and both[0].ranks == both[1].ranks
