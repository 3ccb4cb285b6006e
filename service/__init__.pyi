from .errors import ApiError as ApiError
from .fusion_service import FusionService as FusionService
from .settings import Settings as Settings, SettingsError as SettingsError, read_settings as read_settings
from .startup import open_service as open_service
