"""What a Prometheus and a Grafana need to watch runs: rules, a dashboard, and how they get there.

`rules.yaml`, `panels.py` and the other files here are the only source; `export` makes everything else of them.
"""
