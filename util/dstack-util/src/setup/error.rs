//! Why a boot ended. Owns: the step that failed, its number and name, what to do. Never: a secret.

use super::agent::AgentError;
use super::compose::ComposeError;
use super::disk::DiskError;
use super::environment::EnvironmentError;
use super::host_shared::HostSharedError;
use super::identity::IdentityError;
use super::measure::MeasureError;
use super::provider::ProviderError;
use super::requirements::RequirementError;
use super::verify_app::VerifyAppError;
use crate::files::FileError;
use crate::gateway::GatewayError;
use crate::machine::MachineError;
use crate::program::ProgramError;

/// What failed in a step.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "one a module, named alike")]
pub enum Fault {
    #[error(transparent)]
    HostShared(#[from] HostSharedError),
    #[error(transparent)]
    Compose(#[from] ComposeError),
    #[error(transparent)]
    Requirement(#[from] RequirementError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Measure(#[from] MeasureError),
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    VerifyApp(#[from] VerifyAppError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error(transparent)]
    Pin(#[from] dstack_client::PinError),
    #[error("{0}")]
    Other(String),
}

/// Steps of a boot, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Step {
    HostShared = 1,
    Requirements = 2,
    Time = 3,
    Measure = 4,
    Keys = 5,
    MeasureImage = 6,
    VerifyApp = 7,
    WriteKeys = 8,
    Disk = 9,
    Notify = 10,
    Environment = 11,
}

impl Step {
    /// As messages name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HostShared => "host-shared files",
            Self::Requirements => "requirements",
            Self::Time => "secure time",
            Self::Measure => "measured events",
            Self::Keys => "keys",
            Self::MeasureImage => "image hash",
            Self::VerifyApp => "verify app",
            Self::WriteKeys => "write keys",
            Self::Disk => "data disk",
            Self::Notify => "notify host",
            Self::Environment => "environment, agent and gateway",
        }
    }
}

/// A boot that ended.
#[derive(Debug, thiserror::Error)]
#[error("setup step {} ({}): {fault}", *step as u8, step.name())]
pub struct SetupError {
    /// Where.
    pub step: Step,
    /// Why. Its words are in ours.
    pub fault: Box<Fault>,
}

/// Names the step of a fault.
pub(crate) trait In<T> {
    fn step(self, step: Step) -> Result<T, SetupError>;
}

impl<T, F: Into<Fault>> In<T> for Result<T, F> {
    fn step(self, step: Step) -> Result<T, SetupError> {
        self.map_err(|fault| SetupError { step, fault: Box::new(fault.into()) })
    }
}
