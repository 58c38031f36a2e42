import sys, time, torch
from torch import nn
from torch.optim import lr_scheduler
from tests import crew, loops_of_users as L
from tests.zz_try import killer
import resilient


def f(run, count):
    model = L.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.9)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    out = []
    for e in range(count):
        for x, y in run.batches(L.DATA, **L.SIZES, epochs=1):
            if not out or out[-1][0] != run.step:
                out.append(
                    (
                        run.step,
                        e,
                        {k: float(v.double().sum()) for k, v in model.state_dict().items()},
                        optimizer.param_groups[0]["lr"],
                        float(x.sum()) if False else 0,
                        dict(run.state),
                    )
                )
            L.loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():
            model[4].bias.mul_(0.5)
        run.state["epochs"] = run.state.get("epochs", 0) + 1
    return out


if __name__ == "__main__":
    n = 40
    r = resilient.train(name="l")(f).local(n)
    ref = {o[0]: o for o in r.value}
    c = crew.run(f, n, workers=(2, 3), on_report=killer(7))
    print([(p.kind, p.size, p.base) for p in c.plans], c.end.digest == r.digest)
    for m, v in c.values.items():
        bad = [(o, ref[o[0]]) for o in v if o != ref[o[0]]]
        print(
            m,
            len(v),
            [(k, o[2][k], q[2][k]) for o, q in bad[:1] for k in o[2] if o[2][k] != q[2][k]],
            v[0][:2],
            bad[0][0][3:] if bad else 0,
            bad[0][1][3:] if bad else 0,
        )
