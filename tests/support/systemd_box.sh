#!/bin/bash
# A machine's own systemd as PID 1 of throw-away namespaces, over a copy-on-write view of its root.
#
#   systemd_box.sh DIR [SOURCE TARGET]...      (root)
#
# DIR/content is laid over /; DIR/notify is a datagram socket that is told READY=1 after the boot;
# each SOURCE directory appears, read-only, at TARGET. Nothing outside DIR is written, apart from one
# cgroup, which whoever started this removes. It all ends with the process.
set -euo pipefail

dir=$1
shift
root=$dir/root

if [ "${IN_BOX:-}" = "" ]; then
  # A cgroup of its own is what the box sees as the root of the tree.
  tree=$(findmnt --noheadings --first-only --types cgroup2 --output TARGET)
  mkdir -p "$tree/$(basename "$dir")"
  echo $$ >"$tree/$(basename "$dir")/cgroup.procs"
  IN_BOX=1 exec unshare --fork --kill-child --pid --mount --cgroup --net --ipc --uts \
    --propagation private "$0" "$dir" "$@"
fi

node() { touch "$root/dev/$1" && mount --bind "/dev/$1" "$root/dev/$1"; }

mkdir "$dir/changes" "$root"
mount -t tmpfs tmpfs "$dir/changes"
mkdir "$dir/changes/work"
cp -a "$dir/content" "$dir/changes/upper"
mount -t overlay overlay "$root" \
  -o "lowerdir=/,upperdir=$dir/changes/upper,workdir=$dir/changes/work"

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do node "$name"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
touch "$root/run/notify-boot"
mount --bind "$dir/notify" "$root/run/notify-boot"

while [ $# -gt 0 ]; do
  mount --bind "$1" "$root$2"
  mount -o remount,bind,ro "$root$2"
  shift 2
done

cd "$root"
mkdir -p mnt
pivot_root . mnt
umount --lazy /mnt
# Services get their own views of directories through mounts that must reach them.
mount --make-rshared /
exec env -i container=edge-agent-test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  NOTIFY_SOCKET=/run/notify-boot /lib/systemd/systemd --system --show-status=no
