"""The convolutional network of GenomicBenchmarks (https://doi.org/10.1186/s12863-023-01123-8).

An embedding of 100 features a base; three blocks of convolution (16, 8 and 4 filters of width 8),
batch norm and max-pooling by 2, a ReLU after the first; a dense layer of 512; the classes. Where it
differs from their torch code: two classes have two logits and a cross entropy, where theirs takes a
sigmoid and then a loss that takes it again; sequences are padded to one length, or cut to it.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

from pytitans.data.dna import PAD_ID

SHORTEST = 57  # bases: less does not pass three blocks


@strict
class GenomicCNNConfig(PreTrainedConfig):
    """filters: of each block; input_length: bases, to which every sequence is padded or cut."""

    model_type = "pytitans_genomic_cnn"

    vocab_size: int = 7
    input_length: int = 500
    embedding_size: int = 100
    filters: list[int] | tuple[int, ...] = (16, 8, 4)
    kernel_size: int = 8
    dense_size: int = 512
    pad_token_id: int | None = PAD_ID


class GenomicCNN(PreTrainedModel):
    """See the module's docstring; called as `TitansForSequenceClassification` is."""

    config: GenomicCNNConfig
    accepts_loss_kwargs = False  # a mean over the batch

    def __init__(self, config: GenomicCNNConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        blocks: list[nn.Module] = []
        width, length = config.embedding_size, config.input_length
        for number, filters in enumerate(config.filters):
            blocks += [nn.Conv1d(width, filters, config.kernel_size), nn.BatchNorm1d(filters)]
            blocks += [nn.ReLU()] if number == 0 else []
            blocks += [nn.MaxPool1d(2)]
            width, length = filters, (length - config.kernel_size + 1) // 2
        if length < 1:
            raise ValueError(
                f"input_length={config.input_length} is too short for {len(config.filters)} blocks "
                f"of convolution and pooling: {SHORTEST} or more"
            )
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.dense = nn.Linear(width * length, config.dense_size)
        self.score = nn.Linear(config.dense_size, config.num_labels or 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As torch does."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """input_ids [B, T]; what attention_mask says does not exist is `pad_token_id`."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id or 0)
        more = self.config.input_length - input_ids.shape[1]
        ids = F.pad(input_ids, (0, more), value=self.config.pad_token_id or 0)
        logits = self.score(self.dense(self.blocks(self.embedding(ids).mT)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(GenomicCNNConfig.model_type, GenomicCNNConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GenomicCNNConfig, GenomicCNN, exist_ok=True)
