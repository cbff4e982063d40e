"""`jepa check`: what can be wrong with machines, storage and network before a run begins.

Each check is one function in one file of `checks/` and answers with a `Finding`. `driver.py` runs
them on every node and lets rank 0 compare the answers; `meeting.py` carries the answers through the
ranks' store, so that a node which hangs is reported by the others instead of hanging them.
"""
