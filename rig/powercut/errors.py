"""The errors of the rig, one tree.

    PowercutError           everything the rig raises on purpose; the command line prints it as one sentence
      InputError            a file or an argument given by the user is not what it should be (exit code 2)
      EnvironmentFault      something this machine should have is missing or fails (exit code 2)
      Nondeterministic      a check read something else when it was repeated (verdict UNKNOWN)
      NotServed             a program asked for what a served directory cannot do (verdict UNKNOWN)
      Unanswered            a guest, or QEMU, gave no answer in time (verdict UNKNOWN)
      Crashed               the program under test was ended by a signal (a finding, verdict BROKEN)

The message shows the file, the offset and the offending value, and claims only what was seen.
"""


class PowercutError(Exception):
    """Base of all errors the rig raises on purpose."""


class InputError(PowercutError):
    """The user's file or argument is not what it should be."""


class EnvironmentFault(PowercutError):
    """Something this machine should have is missing, or failed."""


class Nondeterministic(PowercutError):
    """A check did not repeat itself: what it read differs from an earlier run with the same answers."""


class NotServed(PowercutError):
    """A program asked for something that a served directory cannot do."""


class Unanswered(PowercutError):
    """A guest, or QEMU, gave no answer in time."""


class Crashed(PowercutError):
    """The program under test was ended by a signal."""
