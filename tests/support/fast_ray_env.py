"""What lets processes that train start sooner."""

FAST_RAY_ENV = {
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled on a CPU, but DeepSpeed's optimizers would load the compiler
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon it is seen that workers have ended, or died
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process of its own, for nodes that a cloud takes back
}
"""For the environment of a cluster, or of a command."""
