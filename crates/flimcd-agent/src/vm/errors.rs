//! How QEMU's troubles look in the API.

use flimcd_qemu::{AdoptError, QmpError};

use crate::{
    api::{ApiCode, ErrorBody},
    error::refuse,
};

/// A monitor that cannot be reached or asked.
pub(crate) fn qmp_error(error: &QmpError) -> ErrorBody {
    refuse(ApiCode::Qemu, error.to_string(), "")
}

/// A disk that could not be taken or given back.
pub(crate) fn care_error(error: &AdoptError) -> ErrorBody {
    refuse(ApiCode::Qemu, error.to_string(), "")
}
