"""A sandbox like bubblewrap's, for machines without it: `launcher UID SCRATCH PATHS COMMAND...` executes COMMAND in it.

The sandbox has new user (unless root), mount, process, network, IPC and host name namespaces. Its root holds PATHS
read-only, a small /tmp, /dev and /proc. COMMAND has no privileges. Requires kernel 5.12. If a step fails, the launcher
ends with a traceback and code 1, so COMMAND never runs with part of the isolation.
"""

import ctypes
import os
import signal
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MNT_DETACH = 2
# Newer system calls have one number on all architectures; pivot_root is older.
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *arguments):
    """Call a C function that returns -1 on failure. Raises OSError."""
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}{arguments}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=None):
    """Call mount(2). Raises OSError."""
    call(libc.mount, source, target, kind, ctypes.c_ulong(flags), options)


def pivot(new, old):
    """Make `new` the root and move the current root to `old`."""
    call(libc.syscall, ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine]), new, old)
    os.chdir("/")


def bind_read_only(source, target):
    """Mount `source` and all mounts below it at `target`, read-only."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    call(
        libc.syscall,
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_long(AT_FDCWD),
        target,
        ctypes.c_long(AT_RECURSIVE),
        attributes,
        ctypes.c_long(32),
    )


def make_root(paths, scratch):
    """Replace the root of this mount namespace. scratch: mount options of /tmp and /dev/shm."""
    sources = [(os.path.realpath(path), path) for path in paths]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    os.mkdir("/tmp/host")
    os.mkdir("/tmp/new")
    pivot("/tmp", "/tmp/host")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for folder in ("/new/dev/shm", "/new/proc", "/new/tmp", "/new/gone"):
        os.makedirs(folder)
    for folder in ("/new/tmp", "/new/dev/shm"):
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,{scratch}")
    for source, path in sources:
        bind_read_only(f"/host{source}", f"/new{path}")
    # A shared mapping of /dev/zero is memory that counts for no process.
    for name in ("null", "zero", "full", "random", "urandom"):
        source = "null" if name == "zero" else name
        os.close(os.open(f"/new/dev/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/host/dev/{source}", f"/new/dev/{name}", None, MS_BIND)
    for i, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{i}", f"/new/dev/{name}")
    os.symlink("/proc/self/fd", "/new/dev/fd")
    mount_proc("/new/proc")
    pivot("/new", "/new/gone")
    call(libc.umount2, "/gone", MNT_DETACH)
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def mount_proc(target):
    """Mount /proc, if possible with processes only: its other files reveal the host and other sandboxes."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", target, "proc", flags, "subset=pid")
    except OSError:
        mount("proc", target, "proc", flags)


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends."""
    call(libc.prctl, PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def follow(child):
    """Wait for the child and exit with its code."""
    # Otherwise the pipes would stay open after the child's end.
    for fd in (0, 1):
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 255)


def map_user():
    """Enter a new user namespace as nobody."""
    user, group = os.geteuid(), os.getegid()
    call(libc.unshare, CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def main():
    """Build the sandbox and execute COMMAND in it."""
    uid, scratch, paths, *command = sys.argv[1:]
    # A new process group, since kill(0) reaches the whole group even through process namespaces.
    os.setsid()
    die_with_parent()
    if os.geteuid() != 0:
        map_user()
    call(libc.unshare, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    child = os.fork()
    if child:
        follow(child)
    make_root(paths.split(os.pathsep), scratch)
    call(libc.sethostname, "sandbox", ctypes.c_size_t(7))
    if int(uid):
        os.setgroups([])
        os.setresgid(*[int(uid)] * 3)
        os.setresuid(*[int(uid)] * 3)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
    # Again, since a change of user clears this setting.
    die_with_parent()
    # Process 1 stays to reap orphans. No other process may read its memory.
    child = os.fork()
    if child:
        call(libc.prctl, PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)
        follow(child)
    os.chdir("/tmp")
    os.execv(command[0], command)


main()
