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
status=$?
# Not every engine tells why a container ended; the kernel's own count is gone with it.
if [ "$status" -ne 0 ]; then
    for counts in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
        [ -r "$counts" ] || continue
        while read -r name count; do
            if [ "$name" = oom_kill ] && [ "$count" -gt 0 ]; then
                echo >/dante/once/oom
            fi
        done <"$counts"
    done
fi
exit "$status"
