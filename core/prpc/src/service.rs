//! Method names of a service. Owns: the macro that makes an enum of them, prefix stripping, the match by exact case.
//! Source: KMS API reference §1: a service's own prefix is stripped from the left, as often as it stands there.

/// Declares the methods of a service with what each takes and answers; the text is the prefix that its listener strips, empty where none
/// is accepted.
macro_rules! service {
    ($(#[$($doc:tt)*])* $name:ident $prefix:literal { $($(#[$($mdoc:tt)*])* $method:ident($request:ident) -> $response:ident,)+ }) => {
        $(#[$($doc)*])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$($mdoc)*])* $method,)+ }

        impl $name {
            /// The service as data.
            pub const SERVICE: &'static crate::schema::Service = &crate::schema::Service {
                name: stringify!($name),
                prefix: $prefix,
                methods: &[$(crate::schema::Method {
                    name: stringify!($method),
                    request: <$request as crate::schema::Described>::MESSAGE,
                    response: <$response as crate::schema::Described>::MESSAGE,
                },)+],
            };

            /// All methods.
            pub const ALL: &'static [Self] = &[$(Self::$method,)+];

            /// Its name, exact in case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$method => stringify!($method),)+ }
            }

            /// What it takes and answers.
            #[must_use]
            pub fn described(self) -> &'static crate::schema::Method {
                let found = Self::SERVICE.methods.iter().find(|method| method.name == self.name());
                found.expect("both tables are made of the same rows")
            }

            /// The method that a path segment names.
            ///
            /// # Errors
            /// [`UnknownMethod`](crate::RpcError::UnknownMethod), which repeats the start of the segment.
            pub fn method(segment: &str) -> Result<Self, crate::RpcError> {
                let name = crate::service::stripped(segment, $prefix);
                Self::ALL.iter().copied().find(|method| method.name() == name).ok_or_else(|| crate::RpcError::unknown_method(name))
            }
        }
    };
}

pub(crate) fn stripped<'a>(segment: &'a str, prefix: &str) -> &'a str {
    let mut name = segment;
    while let Some(rest) = name.strip_prefix(prefix).filter(|_| !prefix.is_empty()) {
        name = rest;
    }
    name
}

#[cfg(test)]
mod tests {
    use crate::RpcError;
    use crate::guest::DstackGuest;
    use crate::kms::Kms;

    #[test]
    fn strips_its_own_prefix_as_often_as_it_stands_there() {
        for segment in ["GetMeta", "KMS.GetMeta", "KMS.KMS.GetMeta"] {
            assert_eq!(Kms::method(segment), Ok(Kms::GetMeta), "{segment}");
        }
        for segment in ["getmeta", "kms.GetMeta", "Admin.GetMeta", "GetMeta.", "GetMeta/", "", "KMS."] {
            assert!(matches!(Kms::method(segment), Err(RpcError::UnknownMethod { .. })), "{segment}");
        }
        assert_eq!(Kms::method("KMS.Nope").unwrap_err().to_string(), "Service not found: Nope");
        // The guest socket knows no prefix.
        assert!(DstackGuest::method("DstackGuest.Info").is_err());
        for method in Kms::ALL {
            assert_eq!(Kms::method(method.name()), Ok(*method));
        }
    }

    #[test]
    fn repeats_no_more_than_the_start_of_a_name() {
        let text = Kms::method(&"ä".repeat(100_000)).unwrap_err().to_string();
        assert!(text.chars().count() < 120, "{text}");
    }
}
