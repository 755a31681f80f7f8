# The first process of a container: starts the command once for ever, with the log's file as its output.
#
# Run by the image's own /bin/sh, as: sh -c THIS dante COUNT NAME=VALUE... FOLDER COMMAND...
# It stays the container's process 1, so that the command gets signals as anywhere else, and reaps what the job leaves.

# An exclusive create on the machine's disk: however often, and by whomever, the container is started, one start counts.
set -C
{ echo >/dante/once/started; } 2>/dev/null || exit 75
set +C
# Not set from outside: hooks that prepare GPUs, and run with the machine's rights, must not see these (CVE-2025-23266).
count=$1
shift
while [ "$count" -gt 0 ]; do
    export "$1"
    shift
    count=$((count - 1))
done
folder=$1
shift
(
    exec </dev/null >>/dante/log 2>&1
    cd "$folder" || exit 126
    exec "$@"
)
exit "$?"
