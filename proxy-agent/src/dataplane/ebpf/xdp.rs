//! XDP: which way it is attached, why it is not, and to which devices it may send.
//!
//! Only one program fits a device's hook, and what it sends on nobody else sees. So nothing is ever taken off a device, and where XDP is not to
//! be had tc serves alone.

use std::{fs, io, path::Path};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use serde::{Deserialize, Serialize};

use crate::{dataplane::Failure, desired::Device};

/// Whether packets that leave again by an outward device are taken from the stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// By the driver, where it can; elsewhere not.
    Auto,
    /// The same, but a device whose driver cannot is a fault, and is tried again.
    Native,
    /// By the kernel, for every driver: slower than by the driver.
    Generic,
    #[default]
    Off,
}

impl Xdp {
    pub(crate) const fn mode(self) -> Option<Mode> {
        match self {
            Self::Auto | Self::Native => Some(Mode::Native),
            Self::Generic => Some(Mode::Generic),
            Self::Off => None,
        }
    }

    /// What a refusal to attach is.
    pub(crate) fn refusal(self, mode: Mode, error: &io::Error) -> Failure {
        let why = refusal(mode, error);
        if self == Self::Auto { Failure::Unsupported(why) } else { Failure::Retry(why) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Native,
    Generic,
}

impl Mode {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    /// `XDP_FLAGS_DRV_MODE`, `XDP_FLAGS_SKB_MODE`.
    pub(crate) const fn flags(self) -> u32 {
        match self {
            Self::Native => 1 << 2,
            Self::Generic => 1 << 1,
        }
    }
}

/// Why XDP is no use on this device, whatever its driver says.
pub fn bars(device: &Device) -> Option<&'static str> {
    if !device.ethernet || device.mac.is_none() {
        return Some("it has no Ethernet frames");
    }
    device.without_xdp
}

fn refusal(mode: Mode, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "its driver has no XDP; --xdp generic takes every driver, but is slower".into(),
        Some(libc::EBUSY | libc::EEXIST) => {
            "another XDP program is there and stays; take it off (ip link set dev … xdp off) if it is not needed".into()
        }
        Some(libc::EINVAL | libc::ERANGE | libc::EMSGSIZE | libc::ENOSPC | libc::ENOMEM) if mode == Mode::Native => {
            format!(
                "its driver refuses ({error}): mostly the MTU is too large for XDP, or large receive offload is on, or there are too few queues \
                 (ethtool -K … lro off; dmesg may say)"
            )
        }
        _ => error.to_string(),
    }
}

/// `NETDEV_XDP_ACT_BASIC`, `NETDEV_XDP_ACT_NDO_XMIT`.
const RUNS: u64 = 1;
const SENDS: u64 = 1 << 2;

/// What a driver can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Driver {
    /// Runs XDP programs.
    pub runs: bool,
    /// Takes frames that are redirected to it; some do only once they have a program.
    pub sends: bool,
}

/// What this device's driver can; known since 6.3 (d3d854fd6a1d).
pub fn driver(index: u32) -> io::Result<Driver> {
    features(index).map(|features| Driver { runs: features & RUNS != 0, sends: features & SENDS != 0 })
}

/// Whether the driver takes frames that XDP redirects to it. The kernel does not say before the frame is lost.
///
/// Known since 6.3 (d3d854fd6a1d); before, to be careful, no.
pub(crate) fn sends(index: u32) -> bool {
    driver(index).is_ok_and(|driver| driver.sends)
}

/// Drivers of hardware: frames come by a wire, whole. Those of virtual machines hand over what a socket on the same host left for the hardware
/// to do, or may.
const HARDWARE: [&str; 14] = [
    "atlantic",
    "bnxt_en",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mlx4_core",
    "mlx5_core",
    "nfp",
    "nicvf",
    "qede",
    "sfc",
];

/// Whether no frame comes in there whose checksum is yet to be made. What is not known may.
pub(crate) fn makes_sums(index: u32, device: &str) -> bool {
    let path = Path::new("/sys/class/net").join(device);
    // What is mounted there may be another network namespace's.
    let is_it = fs::read_to_string(path.join("ifindex")).is_ok_and(|text| text.trim() == index.to_string());
    let driver = fs::read_link(path.join("device/driver"));
    is_it && driver.is_ok_and(|path| path.file_name().is_some_and(|name| HARDWARE.iter().any(|driver| name == *driver)))
}

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `struct nlmsghdr`, `struct genlmsghdr`.
const HEADER: usize = 16;
const GENERIC: usize = 4;

fn features(index: u32) -> io::Result<u64> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::GENERIC),
    )?;
    let ask = |kind: u16, command: u8, attribute: u16, value: &[u8]| -> io::Result<Vec<u8>> {
        rustix::net::send(&socket, &request(kind, command, attribute, value), SendFlags::empty())?;
        let mut buffer = vec![0; 16 * 1024];
        let (_, length) = rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        buffer.truncate(length);
        answer(&buffer)
    };
    let missing = || io::Error::from(io::ErrorKind::InvalidData);
    let family = ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0")?;
    let id = attribute(&family, CTRL_ATTR_FAMILY_ID).and_then(|id| id.first_chunk()).ok_or_else(missing)?;
    let device = ask(u16::from_ne_bytes(*id), NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &index.to_ne_bytes())?;
    let features = attribute(&device, NETDEV_A_DEV_XDP_FEATURES).and_then(|f| f.first_chunk()).ok_or_else(missing)?;
    Ok(u64::from_ne_bytes(*features))
}

fn request(kind: u16, command: u8, attribute: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut message = ((HEADER + GENERIC + length.next_multiple_of(4)) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and port: one request is out at a time.
    message.extend([0; 8]);
    // Command, version, reserved.
    message.extend([command, 1, 0, 0]);
    message.extend((length as u16).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
    message
}

/// The attributes of the answer.
fn answer(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let length = bytes.first_chunk().map(|l| u32::from_ne_bytes(*l) as usize).ok_or_else(invalid)?;
    let kind = bytes.get(4..).and_then(|k| k.first_chunk()).map(|k| u16::from_ne_bytes(*k)).ok_or_else(invalid)?;
    let body = bytes.get(HEADER..length).ok_or_else(invalid)?;
    if kind == NLMSG_ERROR {
        let code = body.first_chunk().map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
        return Err(io::Error::from_raw_os_error(-code));
    }
    body.get(GENERIC..).map(<[u8]>::to_vec).ok_or_else(invalid)
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
        let body = bytes.get(4..length)?;
        if kind == wanted {
            return Some(body);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_bounded() {
        // What the kernel sends is of the same form.
        let message = request(77, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_XDP_FEATURES, &SENDS.to_ne_bytes());
        let attributes = answer(&message).unwrap();
        assert_eq!(attribute(&attributes, NETDEV_A_DEV_XDP_FEATURES), Some(&SENDS.to_ne_bytes()[..]));
        assert_eq!(attribute(&attributes, NETDEV_A_DEV_IFINDEX), None);
        for cut in 0..message.len() {
            assert!(answer(&message[..cut]).is_err(), "{cut}");
        }
        for cut in 0..attributes.len() {
            assert_eq!(attribute(&attributes[..cut], NETDEV_A_DEV_XDP_FEATURES), None, "{cut}");
        }
        let mut refusal = 20_u32.to_ne_bytes().to_vec();
        refusal.extend(NLMSG_ERROR.to_ne_bytes());
        refusal.resize(HEADER, 0);
        refusal.extend((-libc::ENODEV).to_ne_bytes());
        assert_eq!(answer(&refusal).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn a_refusal_names_cause_and_remedy() {
        let text = |code| refusal(Mode::Native, &io::Error::from_raw_os_error(code));
        assert!(text(libc::EOPNOTSUPP).contains("--xdp generic"));
        assert!(text(libc::EBUSY).contains("another XDP program"));
        assert!(text(libc::ERANGE).contains("MTU"));
    }
}
