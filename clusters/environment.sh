# What Ray's processes, and so the jobs, find in their environment on every node of a launcher's cluster (docs/cluster.md).
export PATH="$HOME/venv/bin:$PATH"
export POLYPROMPT_HOME=/mnt/polyprompt   # the folder that all nodes share: runs, and the tracking store's files
export RAY_AUTH_MODE=token               # docs/security.md
export RAY_JOB_STOP_WAIT_TIME_S=60       # `ray job stop` waits so long for the last bundle
export RAY_USAGE_STATS_ENABLED=0
export MLFLOW_DISABLE_TELEMETRY=true
