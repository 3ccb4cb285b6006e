from .base_model import load_tokenizer as load_tokenizer
from .builtin.base import make_base as make_base
from .builtin.orders import draw_orders as draw_orders
from .config import (
    CheckpointConfig as CheckpointConfig,
    Config as Config,
    DataConfig as DataConfig,
    LogConfig as LogConfig,
    LoraConfig as LoraConfig,
    ModelConfig as ModelConfig,
    PolicyConfig as PolicyConfig,
    TrainConfig as TrainConfig,
)
from .convert import export as export, merge as merge
from .errors import ConfigError as ConfigError, NonFiniteLossError as NonFiniteLossError
from .gates.config import GateConfig as GateConfig
from .gates.train import train_gate as train_gate
from .loop.fit import Progress as Progress
from .recipe import load_recipe as load_recipe
from .registration import register as register
from .rows.chats import Chat as Chat
from .rows.dataset import Dataset as Dataset, build_dataset as build_dataset
from .rows.readers import read_chats as read_chats
from .run import resume as resume, start as start
