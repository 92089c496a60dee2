"""Sound and pictures with their rate: bounded reading, writing, and what a file says of itself.

Every file is opened as hostile. Its kind is told from its first bytes, never from its name; its header is held against
:class:`Limits` before anything is allocated; samples are decoded in blocks and counted against what the header
promised. Whatever is wrong with a file comes out as one sentence in a DataError.
"""

from avray.media.clips import joined, read_video, rescaled
from avray.media.identity import content_hash
from avray.media.reading import probe, probe_video, read_audio, stream_audio
from avray.media.types import Audio, AudioInfo, Limits, Video, VideoInfo, resampled_length
from avray.media.writing import Fragments, write_audio, write_video

__all__ = [
    "Audio", "AudioInfo", "Fragments", "Limits", "Video", "VideoInfo", "content_hash", "joined", "probe",
    "probe_video", "read_audio", "read_video", "resampled_length", "rescaled", "stream_audio", "write_audio",
    "write_video",
]
