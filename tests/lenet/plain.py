"""LeNet-5 without tricks: what the fast one is compared with."""

import torch.nn as nn
import torch.nn.functional as F


class Plain(nn.Module):
    """The network as everybody writes it, with the parameters' names of LeNet5."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            nn.Conv2d(1, 6, 5),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 16, 5),
            nn.BatchNorm2d(16),
        )
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))
