"""What others show runs with: TensorBoard, MLflow, W&B, Trackio (`output.trackers`).

`steps.jsonl` and `evals.jsonl` are the truth. A tracker is a reader of them, in a process of its
own (`__main__.py`) that the training starts and never waits for (`display.py`).
"""
