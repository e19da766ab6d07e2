"""The errors that a user can act on; anything else that escapes is a defect of jaxblip."""


class UserError(Exception):
    """Bad input: one sentence with the wrong value, where it came from, and the fix."""


class RunStopped(UserError):
    """A run that had to stop by itself: too many bad samples, or losses that are not finite."""
