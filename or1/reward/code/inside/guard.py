"""Protection of the kernel and the runner: a filter of system calls, and no access to the runner's memory.

Part of both scripts, after wire.py. Namespaces hide files, network and processes. The denied calls bypass them.
Keyrings outlive a program. System V memory, memfd, shared anonymous mappings and socket buffers escape the memory
limit. vsock is not part of a network namespace. A nested namespace gives back privileges inside it.
"""

from __future__ import annotations

import ctypes
import os
import struct

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 22, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL, LINUX_CAPABILITY_VERSION_3 = 4, 0x20080522
SECCOMP_MODE_FILTER = 2
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# Name of a call -> its numbers on x86_64 and aarch64, which are equal from 424 on.
DENIED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "lookup_dcookie": (212, 18),
    # Memory that counts for no process, and notifications about other programs' access to the same files.
    "vmsplice": (278, 75),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "flock": (73, 32),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
CLONE, CLONE3, SOCKETS, MMAP, PRLIMIT = (56, 220), 435, ((41, 198), (53, 199)), (9, 222), (302, 261)
# AF_UNIX and AF_NETLINK. TCP buffers share a limit of the whole machine, and TCP ports outlive a test.
FAMILIES = (1, 16)
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
NEW_NAMESPACES = 0x7E020000
# Machine -> column of DENIED, and the kernel's number for the machine (AUDIT_ARCH_*).
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 40

libc = ctypes.CDLL(None, use_errno=True)


def hide_process():
    """Drop all capabilities, and deny the user's other processes this one's memory and descriptors. Raises OSError.

    Forked children inherit both.
    """
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header, none = struct.pack("@Ii", LINUX_CAPABILITY_VERSION_3, 0), struct.pack("@6I", 0, 0, 0, 0, 0, 0)
    if libc.capset(header, none):
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")
    prctl(PR_SET_DUMPABLE, 0)


def leave_process_one():
    """Continue in a child if this is process 1 of the sandbox. Process 1 then only reaps orphans."""
    if os.getpid() != 1:
        return
    child = os.fork()
    if child == 0:
        die_with_parent()
        return
    hide_process()
    # Otherwise the pipes would stay open after the child's end.
    for fd in (0, 1):
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 255)


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends."""
    prctl(PR_SET_PDEATHSIG, 9)


def call_filter(machine):
    """Return the filter as bytes of struct sock_filter, or None for a machine that is not in MACHINES."""
    if machine not in MACHINES:
        return None
    column, architecture = MACHINES[machine]

    def deny(number, error):
        return [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | error)]

    # The numbers of another architecture (32-bit calls, x32) are not in the list.
    rules = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    rules += [(LOAD, 0, 0, NUMBER), (JUMP_ABOVE, 0, 1, 0x40000000), (RETURN, 0, 0, ERROR | EPERM)]
    for numbers in DENIED.values():
        rules += deny(numbers[column], EPERM) if numbers[column] is not None else []
    # A filter cannot read the flags of clone3. Without clone3, libc uses clone, whose flags are an argument.
    rules += deny(CLONE3, ENOSYS)
    rules += [
        (JUMP_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_BITS, 0, 1, NEW_NAMESPACES),
        (RETURN, 0, 0, ERROR | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    for numbers in SOCKETS:
        rules += [(JUMP_EQUAL, 0, 2 + 2 * len(FAMILIES), numbers[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
        for family in FAMILIES:
            rules += [(JUMP_EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
        rules += [(RETURN, 0, 0, ERROR | EAFNOSUPPORT)]
    # The pages of a shared anonymous mapping remain after a process unmaps them.
    rules += [
        (JUMP_EQUAL, 0, 5, MMAP[column]),
        (LOAD, 0, 0, FOURTH_ARGUMENT),
        (JUMP_BITS, 0, 2, MAP_ANONYMOUS),
        (JUMP_BITS, 0, 1, MAP_SHARED),
        (RETURN, 0, 0, ERROR | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    # A process may set its own limits only, since the runner has the same user.
    rules += [
        (JUMP_EQUAL, 0, 3, PRLIMIT[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, ERROR | EPERM),
    ]
    rules += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


def refuse_calls(rules):
    """Install a filter of `call_filter` for this process and its future children. Raises OSError."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if rules is None:
        return
    kept = ctypes.create_string_buffer(rules, len(rules))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rules) // 8, ctypes.addressof(kept)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def prctl(option, *arguments):
    """Call prctl(2). Raises OSError."""
    words = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *words):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
