import sys, time
from tests import crew, loops_of_users as L
import resilient


def killer(step):
    done = []

    def on_report(report, hand):
        if not done and report.step >= step and hand.plan is not None and hand.plan.size > 1:
            done.append(1)
            hand.kill(hand.plan.members[-1])

    return on_report


if __name__ == "__main__":
    for name in sys.argv[1:]:
        f = getattr(L, name)
        n = 10 if name == "epochs" else 120
        t = time.time()
        r = resilient.train(name="l")(f).local(n)
        print(name, round(time.time() - t, 1))
        t = time.time()
        c = crew.run(f, n, workers=(2, 3), on_report=killer(7))
        print(
            "kill",
            c.end.digest == r.digest,
            c.end.reason[-600:],
            [(p.kind, p.size) for p in c.plans],
            round(time.time() - t, 1),
            len(set(map(str, c.values.values()))),
            c.said[-4:],
        )
